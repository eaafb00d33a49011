"""What every operation stands on: backends, registration, checks, records."""
