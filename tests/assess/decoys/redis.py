class Redis:
    """No database: a file of this project that has the name of one."""
