"""Named so because a package `horovod` here would hide the real one."""
