"""The style that all plots share. Matplotlib comes with the extra ``evaluation`` and is imported by the functions."""
