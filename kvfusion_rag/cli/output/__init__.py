"""What commands print that is too long for their own modules."""
