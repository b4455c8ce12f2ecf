"""The verbs of `laid`, one a file: arguments in, one call, words out."""
