"""The conformance suite: what every backend has to do, at every world size.

Every test of this directory is a function that runs on every rank of a world, in step. It asserts
with ``idist.get_rank()`` and ``idist.get_world_size()`` alone, and knows nothing of how the ranks
came to be. A test that takes the fixture ``world`` runs once instead, beside the ranks.

The worlds are listed in ``worlds.py``: a new backend is a line there. Started on every rank by a
launcher, with IDIST_ATTACH naming the backend, pytest is itself a rank of the one world there is::

    IDIST_ATTACH=gloo torchrun --nproc_per_node 2 -m pytest tests/conformance
"""
