"""Registration of H&E images to Xenium samples.

    matrix = alignment.read_alignment("he_imagealignment.csv")
    registration = register.register(he, dapi, nuclei.geometry, 0.2125, matrix, RegistrationSettings(), name="lung")
    registration.write("registration.json")
    result.read_registration("registration.json").um_to_he()

A matrix (3, 3) always maps H&E level-0 px (x, y, 1) to Xenium px; um = Xenium px times `pixel_size`.
"""
