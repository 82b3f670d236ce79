"""Clinical quantities from masks: volumes, diameters, burden, growth and response.

Pure functions on volumes: no files, no ranks, no network. They ask a `LabelScheme` for structures
and know no label value and no organ. Positions in mm are the patient's, RAS+ as NIfTI has them (x
to the right, y to the front, z to the head). How well diameters are measured is stated in
`diameters`.
"""
