"""Post-training quantisation: a compact network in int8."""
