"""Why a node or a pod has to go: one source a file, all behind base.NoticeSource."""
