{{- define "midstream.labels" -}}
app.kubernetes.io/name: midstream
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* Of one component: (list . "agent"). */}}
{{- define "midstream.selector" -}}
app.kubernetes.io/name: midstream
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/* An image: (list . "agent"). */}}
{{- define "midstream.image" -}}
{{- $root := index . 0 -}}
{{- with $root.Values.image.registry }}{{ . }}/{{ end }}midstream-{{ index . 1 }}:{{ $root.Values.image.tag | default $root.Chart.AppVersion }}
{{- end }}

{{- define "midstream.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* What needs no power at all. */}}
{{- define "midstream.unprivileged" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
runAsUser: 65532
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* The operator's configuration file. */}}
{{- define "midstream.config" -}}
{{- $config := dict "namespace" .Release.Namespace "agentPort" .Values.agent.port "pools" .Values.pools "limits" .Values.limits -}}
{{- $_ := set $config "certificates" .Values.tls.issuer -}}
{{- $_ := set $config "handling" (dict "rebalance" .Values.rebalance.policy "capacity" .Values.rebalance.capacity) -}}
{{- $_ := set $config "certificateDays" .Values.tls.days -}}
{{- $aws := dict -}}
{{- if .Values.aws.cluster -}}
{{- $_ := set $aws "ec2" (dict "cluster" .Values.aws.cluster "region" .Values.aws.region "securityGroups" .Values.aws.securityGroups "createReservations" .Values.aws.createReservations) -}}
{{- end -}}
{{- if .Values.aws.queueUrl -}}
{{- $_ := set $aws "sqs" (dict "queueUrl" .Values.aws.queueUrl "region" .Values.aws.region) -}}
{{- end -}}
{{- if $aws }}{{- $_ := set $config "aws" $aws -}}{{- end -}}
{{- if .Values.webhook.enabled -}}
{{- $_ := set $config "webhook" (dict "port" 9444 "image" (include "midstream.image" (list . "runtime")) "graceS" .Values.webhook.graceSeconds) -}}
{{- end -}}
{{- toYaml (mustMergeOverwrite $config .Values.operator.config) -}}
{{- end }}

{{- define "midstream.check" -}}
{{- range .Values.pools -}}
{{- if and (eq .provider "ec2") (not $.Values.aws.cluster) -}}
{{- fail (printf "pool %s is of provider ec2: set aws.cluster, the tag that says which interfaces are ours" .name) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.webhook.enabled (ne .Values.tls.issuer "operator") -}}
{{- fail "webhook.enabled needs tls.issuer: operator, which makes the certificate that the API server trusts" -}}
{{- end -}}
{{- end }}
