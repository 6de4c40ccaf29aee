"""Maps as plain data: outlines of regions, and colours for quantities. The report and ``topt-run map`` draw with it."""
