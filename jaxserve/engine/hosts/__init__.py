"""One engine over several hosts: the first plans and answers, the others do as it says."""
