"""What commands accept: the values of their options, their paths, and options made from dataclasses."""
