from cpmbee.plain.prompt import encode_data as encode_data
from cpmbee.plain.prompt import encode_prompt as encode_prompt
