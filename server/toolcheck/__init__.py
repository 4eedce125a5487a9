"""Checks that a tool parser says the same of an answer whether it is streamed or not, wherever it is cut."""
