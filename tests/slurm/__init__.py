"""What a program finds under a real Slurm. `make test-slurm` starts four nodes on this machine and runs these tests.

The nodes, node1 to node4, have a network and a host name of their own; the tests run on the login node, ctl. Programs
and files are the same everywhere. What srun starts are the scripts in ``scripts/``, which leave what they saw in files.
"""
