"""Spend sparse networks better after drawing them."""
