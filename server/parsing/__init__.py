"""What the model wrote, told apart: reasoning, answer, tool calls."""
