"""Speed, memory and quality against the project's targets: ``make bench`` prints one table."""
