"""Deciding while a model trains: the step protocol, several processes as one, pruning, Trainer's events, resume."""
