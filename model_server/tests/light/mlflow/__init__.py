"""As much of MLflow as a runner needs, for models that are one short file."""
