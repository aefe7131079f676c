# The operator's role and the queue of its notices. docs/iam.md says why each line is there.
variable "cluster" { type = string }
variable "region" { type = string }
variable "account" { type = string }
variable "subnet_ids" { type = list(string) }
variable "security_group_id" { type = string }
variable "namespace" {
  type    = string
  default = "midstream-system"
}

locals {
  ec2 = "arn:aws:ec2:${var.region}:${var.account}"
}

data "aws_iam_policy_document" "midstream" {
  statement {
    sid       = "Look"
    resources = ["*"]
    actions = [
      "ec2:DescribeInstances",
      "ec2:DescribeInstanceTypes",
      "ec2:DescribeNetworkInterfaces",
      "ec2:DescribeSubnets",
      "ec2:GetSubnetCidrReservations",
    ]
  }
  statement {
    sid       = "MakeTaggedInterfaces"
    actions   = ["ec2:CreateNetworkInterface"]
    resources = ["${local.ec2}:network-interface/*"]
    condition {
      test     = "StringEquals"
      variable = "aws:RequestTag/midstream.dev/cluster"
      values   = [var.cluster]
    }
  }
  statement {
    sid       = "MakeThemInOurSubnets"
    actions   = ["ec2:CreateNetworkInterface"]
    resources = concat([for id in var.subnet_ids : "${local.ec2}:subnet/${id}"], ["${local.ec2}:security-group/${var.security_group_id}"])
  }
  statement {
    sid       = "TagThemOnlyWhenMade"
    actions   = ["ec2:CreateTags"]
    resources = ["${local.ec2}:network-interface/*"]
    condition {
      test     = "StringEquals"
      variable = "ec2:CreateAction"
      values   = ["CreateNetworkInterface"]
    }
  }
  statement {
    sid       = "UseOurInterfaces"
    resources = ["${local.ec2}:network-interface/*"]
    actions = [
      "ec2:AssignPrivateIpAddresses",
      "ec2:UnassignPrivateIpAddresses",
      "ec2:AssignIpv6Addresses",
      "ec2:UnassignIpv6Addresses",
      "ec2:AttachNetworkInterface",
      "ec2:ModifyNetworkInterfaceAttribute",
      "ec2:DeleteNetworkInterface",
    ]
    condition {
      test     = "StringEquals"
      variable = "aws:ResourceTag/midstream.dev/cluster"
      values   = [var.cluster]
    }
  }
  statement {
    sid       = "AttachThemToNodes"
    actions   = ["ec2:AttachNetworkInterface"]
    resources = ["${local.ec2}:instance/*"]
    condition {
      test     = "StringLike"
      variable = "aws:ResourceTag/kubernetes.io/cluster/${var.cluster}"
      values   = ["*"]
    }
  }
  statement {
    sid       = "HearNotices"
    actions   = ["sqs:ReceiveMessage", "sqs:DeleteMessage"]
    resources = [aws_sqs_queue.midstream.arn]
  }
  statement {
    sid       = "CompleteLifecycleActions"
    actions   = ["autoscaling:CompleteLifecycleAction", "autoscaling:RecordLifecycleActionHeartbeat"]
    resources = ["arn:aws:autoscaling:${var.region}:${var.account}:autoScalingGroup:*:autoScalingGroupName/*"]
    condition {
      test     = "StringLike"
      variable = "aws:ResourceTag/kubernetes.io/cluster/${var.cluster}"
      values   = ["*"]
    }
  }
}

data "aws_iam_policy_document" "trust" {
  statement {
    actions = ["sts:AssumeRole", "sts:TagSession"]
    principals {
      type        = "Service"
      identifiers = ["pods.eks.amazonaws.com"]
    }
  }
}

resource "aws_iam_role" "midstream" {
  name               = "midstream-${var.cluster}"
  assume_role_policy = data.aws_iam_policy_document.trust.json
}

resource "aws_iam_role_policy" "midstream" {
  role   = aws_iam_role.midstream.id
  policy = data.aws_iam_policy_document.midstream.json
}

resource "aws_eks_pod_identity_association" "midstream" {
  cluster_name    = var.cluster
  namespace       = var.namespace
  service_account = "midstream-operator"
  role_arn        = aws_iam_role.midstream.arn
}

# A notice that is five minutes old is of no use to anybody.
resource "aws_sqs_queue" "midstream" {
  name                       = "midstream-${var.cluster}"
  message_retention_seconds  = 300
  visibility_timeout_seconds = 20
  sqs_managed_sse_enabled    = true
}

data "aws_iam_policy_document" "queue" {
  statement {
    actions   = ["sqs:SendMessage"]
    resources = [aws_sqs_queue.midstream.arn]
    principals {
      type        = "Service"
      identifiers = ["events.amazonaws.com"]
    }
    condition {
      test     = "ArnEquals"
      variable = "aws:SourceArn"
      values   = [for rule in aws_cloudwatch_event_rule.midstream : rule.arn]
    }
  }
}

resource "aws_sqs_queue_policy" "midstream" {
  queue_url = aws_sqs_queue.midstream.url
  policy    = data.aws_iam_policy_document.queue.json
}

locals {
  rules = {
    ec2 = {
      source = ["aws.ec2"]
      detail-type = [
        "EC2 Spot Instance Interruption Warning",
        "EC2 Capacity Reservation Instance Interruption Warning",
        "EC2 Instance Rebalance Recommendation",
      ]
    }
    state = {
      source      = ["aws.ec2"]
      detail-type = ["EC2 Instance State-change Notification"]
      detail      = { state = ["stopping", "stopped", "shutting-down", "terminated"] }
    }
    asg    = { source = ["aws.autoscaling"], detail-type = ["EC2 Instance-terminate Lifecycle Action"] }
    health = { source = ["aws.health"], detail-type = ["AWS Health Event"], detail = { service = ["EC2"], eventTypeCategory = ["scheduledChange"] } }
  }
}

resource "aws_cloudwatch_event_rule" "midstream" {
  for_each      = local.rules
  name          = "midstream-${var.cluster}-${each.key}"
  event_pattern = jsonencode(each.value)
}

resource "aws_cloudwatch_event_target" "midstream" {
  for_each = local.rules
  rule     = aws_cloudwatch_event_rule.midstream[each.key].name
  arn      = aws_sqs_queue.midstream.arn
}

output "queue_url" { value = aws_sqs_queue.midstream.url }
