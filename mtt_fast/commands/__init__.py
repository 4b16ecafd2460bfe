"""What the commands share: options, parsing, exit statuses, plots, tables and records."""
