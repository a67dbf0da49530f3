"""backupd: backup and disaster recovery for container stacks."""

__version__ = "0.1.0"
