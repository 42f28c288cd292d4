"""Between text and tokens: tokenizer, chat templates, parsing of outputs."""
