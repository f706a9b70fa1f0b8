# SPDX-License-Identifier: Apache-2.0
"""The parts of the driver's face, one for each thing that a compute service does.

Method names and signatures are OpenStack Nova's (nova.virt.driver.ComputeDriver),
and nothing of Nova is needed: objects are read by their attributes, additional
keyword arguments are tolerated, because Nova's signatures drift.
"""
