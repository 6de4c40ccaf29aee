"""A city's tables as checked arrays: Parquet, columns, shapes, features."""
