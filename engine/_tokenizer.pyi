from cpmbee.plain.tokenizer import Tokenizer as Tokenizer
