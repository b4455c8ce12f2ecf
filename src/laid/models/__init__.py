"""Any vision-language checkpoint: loading, inputs, prompts, features, its decoder, its queries and keys.

One file a family lives in families/; nothing here knows a method or a training.
"""
