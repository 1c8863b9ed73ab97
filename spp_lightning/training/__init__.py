"""The method wired to the events of a Lightning Trainer."""
