"""Integer vocabularies shared by featurizer, relation kernels and model.

They stand apart from ``chemistry`` so that training from prepared shards needs neither RDKit nor ``chemistry``.
Codes are those of OGB 1.3.6 (``ogb.utils.features``), the last code of an open vocabulary meaning "other".
"""

from __future__ import annotations

from typing import Final

FEATURIZER_VERSION: Final = 1
"""Raised whenever the same input would give other codes; part of every data-set fingerprint."""

ATOM_FEATURE_NAMES: Final = (
    "atomic_number",
    "chirality",
    "degree",
    "formal_charge",
    "num_hydrogens",
    "num_radical_electrons",
    "hybridization",
    "is_aromatic",
    "is_in_ring",
)
"""The 9 OGB atom categories, in column order."""

ATOM_VOCAB_SIZES: Final = (119, 5, 12, 12, 10, 6, 6, 2, 2)
"""Number of codes of each atom category. Atomic number Z has code Z - 1; 118 means other."""

BOND_FEATURE_NAMES: Final = ("bond_type", "stereo", "is_conjugated")
"""The 3 OGB bond categories, in column order."""

BOND_VOCAB_SIZES: Final = (5, 6, 2)
"""Number of codes of each bond category: type (4 = other), stereo (5 = STEREOANY), conjugated."""

NUM_BOND_CODES: Final = 1 + 5 * 6 * 2
"""Codes of one hop of a path: 0 for no hop, else ``1 + (type * 6 + stereo) * 2 + conjugated``."""

NO_HOP: Final = 0
"""Path code where the path has no such hop (also the diagonal and unreachable pairs)."""

NUM_HOPS: Final = 5
"""Hops of a path that the edge relation keeps (paper, appendix; ``multi_hop_max_dist`` in the official code)."""

UNREACHABLE: Final = 255
"""Shortest-path distance of atoms in different fragments (510 in the official code)."""

MAX_SPD: Final = 254
"""Longest shortest-path distance kept; longer ones, only possible beyond 255 atoms in a chain, are stored as this."""

_SYMBOLS = """
    H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Y Zr Nb
    Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au
    Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts
    Og
"""
ELEMENT_SYMBOLS: Final = (*_SYMBOLS.split(), "*")
"""Symbol of each code of the first atom category: code Z - 1 is the element of atomic number Z, the last is none."""

_DESCRIPTORS = """
    MaxAbsEStateIndex MaxEStateIndex MinAbsEStateIndex MinEStateIndex qed SPS MolWt HeavyAtomMolWt ExactMolWt
    NumValenceElectrons NumRadicalElectrons MaxPartialCharge MinPartialCharge MaxAbsPartialCharge MinAbsPartialCharge
    FpDensityMorgan1 FpDensityMorgan2 FpDensityMorgan3 BCUT2D_MWHI BCUT2D_MWLOW BCUT2D_CHGHI BCUT2D_CHGLO
    BCUT2D_LOGPHI BCUT2D_LOGPLOW BCUT2D_MRHI BCUT2D_MRLOW AvgIpc BalabanJ BertzCT Chi0 Chi0n Chi0v Chi1 Chi1n Chi1v
    Chi2n Chi2v Chi3n Chi3v Chi4n Chi4v HallKierAlpha Kappa1 Kappa2 Kappa3 LabuteASA PEOE_VSA1 PEOE_VSA10 PEOE_VSA11
    PEOE_VSA12 PEOE_VSA13 PEOE_VSA14 PEOE_VSA2 PEOE_VSA3 PEOE_VSA4 PEOE_VSA5 PEOE_VSA6 PEOE_VSA7 PEOE_VSA8 PEOE_VSA9
    SMR_VSA1 SMR_VSA10 SMR_VSA2 SMR_VSA3 SMR_VSA4 SMR_VSA5 SMR_VSA6 SMR_VSA7 SMR_VSA8 SMR_VSA9 SlogP_VSA1 SlogP_VSA10
    SlogP_VSA11 SlogP_VSA12 SlogP_VSA2 SlogP_VSA3 SlogP_VSA4 SlogP_VSA5 SlogP_VSA6 SlogP_VSA7 SlogP_VSA8 SlogP_VSA9
    TPSA EState_VSA1 EState_VSA10 EState_VSA11 EState_VSA2 EState_VSA3 EState_VSA4 EState_VSA5 EState_VSA6 EState_VSA7
    EState_VSA8 EState_VSA9 VSA_EState1 VSA_EState10 VSA_EState2 VSA_EState3 VSA_EState4 VSA_EState5 VSA_EState6
    VSA_EState7 VSA_EState8 VSA_EState9 FractionCSP3 HeavyAtomCount NHOHCount NOCount NumAliphaticCarbocycles
    NumAliphaticHeterocycles NumAliphaticRings NumAmideBonds NumAromaticCarbocycles NumAromaticHeterocycles
    NumAromaticRings NumAtomStereoCenters NumBridgeheadAtoms NumHAcceptors NumHDonors NumHeteroatoms NumHeterocycles
    NumRotatableBonds NumSaturatedCarbocycles NumSaturatedHeterocycles NumSaturatedRings NumSpiroAtoms
    NumUnspecifiedAtomStereoCenters Phi RingCount MolLogP MolMR fr_Al_COO fr_Al_OH fr_Al_OH_noTert fr_ArN fr_Ar_COO
    fr_Ar_N fr_Ar_NH fr_Ar_OH fr_COO fr_COO2 fr_C_O fr_C_O_noCOO fr_C_S fr_HOCCN fr_Imine fr_NH0 fr_NH1 fr_NH2 fr_N_O
    fr_Ndealkylation1 fr_Ndealkylation2 fr_Nhpyrrole fr_SH fr_aldehyde fr_alkyl_carbamate fr_alkyl_halide
    fr_allylic_oxid fr_amide fr_amidine fr_aniline fr_aryl_methyl fr_azide fr_azo fr_barbitur fr_benzene
    fr_benzodiazepine fr_bicyclic fr_diazo fr_dihydropyridine fr_epoxide fr_ester fr_ether fr_furan fr_guanido
    fr_halogen fr_hdrzine fr_hdrzone fr_imidazole fr_imide fr_isocyan fr_isothiocyan fr_ketone fr_ketone_Topliss
    fr_lactam fr_lactone fr_methoxy fr_morpholine fr_nitrile fr_nitro fr_nitro_arom fr_nitro_arom_nonortho fr_nitroso
    fr_oxazole fr_oxime fr_para_hydroxylation fr_phenol fr_phenol_noOrthoHbond fr_phos_acid fr_phos_ester fr_piperdine
    fr_piperzine fr_priamide fr_prisulfonamd fr_pyridine fr_quatN fr_sulfide fr_sulfonamd fr_sulfone fr_term_acetylene
    fr_tetrazole fr_thiazole fr_thiocyan fr_thiophene fr_unbrch_alkane fr_urea
"""
STORED_DESCRIPTORS: Final = tuple(_DESCRIPTORS.split())
"""RDKit's names of the descriptors that shards may hold, in the order of their columns: all two-dimensional ones of RDKit
2026.09 but Ipc, which overflows. A fixed list, so that encoders of different data sets predict the same."""

NUM_DESCRIPTORS: Final = len(STORED_DESCRIPTORS)
"""Numbers that describe a molecule, if it is described."""
