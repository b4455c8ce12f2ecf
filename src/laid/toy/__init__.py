"""The small-scale family: scenes rendered in COCO format, its tokenizer, its models, their pretraining."""
