"""Measures whether the documents support an answer: ``signals`` reads question and answer again, ``judging`` decides."""
