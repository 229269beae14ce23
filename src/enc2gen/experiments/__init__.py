"""EXPERIMENTS: recipes, the stages that carry them out, and reports."""
