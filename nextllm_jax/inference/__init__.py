"""From prompts to text: sampling, the generate loop, streaming."""
