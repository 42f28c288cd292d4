"""The schedules of the DBRX paper and their comparison; no other package but `cli` uses it."""
