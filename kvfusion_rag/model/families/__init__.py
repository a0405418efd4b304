"""The compatibility table: what was measured on a small random model of each family."""
