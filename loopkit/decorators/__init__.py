"""The built-in decorators, a file for each word; none of them imports another."""
