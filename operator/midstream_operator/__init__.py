"""The operator: watches notices and MigrationJobs and directs the agents."""
