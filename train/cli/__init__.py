"""The commands of ``topt-deploy`` that train, encode, evaluate and report: one a file."""
