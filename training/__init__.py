"""What a long or a large training needs: kills and resumes, many processes, time budgets, the optimiser, a plan."""
