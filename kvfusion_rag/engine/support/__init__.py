"""Whether the documents answer a question: ``signals`` reads the question over them, and ``judging`` decides."""
