"""Servers under load: the clients' calls, the phases of a run, and the servers themselves."""
