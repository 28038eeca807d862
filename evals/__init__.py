"""How a model is judged: FLEXI's scenarios, a recogniser of what is spoken, pictures."""
