"""What commands accept: the values of their options, their paths, and options that dataclasses or clusters need."""
