"""The commands of ``topt-deploy`` that export and sign: one a file."""
