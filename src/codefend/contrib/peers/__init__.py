"""Other papers' purifiers on this project's network: HGD, FlowPure, ADBM and CoDefend-R."""
