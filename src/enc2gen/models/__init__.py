"""MODEL: generators grown out of encoders."""
