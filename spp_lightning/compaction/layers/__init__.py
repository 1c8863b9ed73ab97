"""Modules and the operator that compute kept columns only."""
