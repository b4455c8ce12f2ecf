"""COCO through its own tools, the haystacks built from it, question files, and what shortcuts score on them.

Reads and writes files; knows no model.
"""
