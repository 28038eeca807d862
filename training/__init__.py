"""What a long or large training needs: resuming, many processes, time budgets, the optimiser, a plan."""
