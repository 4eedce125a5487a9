"""What a model thought before it answered, told from the answer: formats as declarations, and who reads them."""
