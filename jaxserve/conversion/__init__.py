"""Conversion of any checkpoint that can be served to one that loads straight into a mesh."""
