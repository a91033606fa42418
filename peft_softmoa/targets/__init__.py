"""Which blocks of which model are adapted, and what is trained with them."""
